"""How does PEFT meet it? Injection, loading, and the registration in PEFT."""
