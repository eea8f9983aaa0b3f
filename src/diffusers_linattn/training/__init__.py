"""Training of converted attention layers: what is trained, towards what, and the loop that does it."""
