"""What watches training? Callbacks for `Trainer`, and what they look at."""
