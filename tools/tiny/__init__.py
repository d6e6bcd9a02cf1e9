"""How the built-in backbone was made: its design, the lessons and the training."""
