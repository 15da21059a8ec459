"""What transformers' Trainer lacks: bit-equal resume, any number of processes, no pickle."""
