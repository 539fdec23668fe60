"""What the public port answers: generate (in whichever API), tokenize, models, health; that nothing
is stored."""
