"""Side by side with TRL, PEFT and transformers on this machine: `make bench`. Nothing in here is imported by the package."""
