"""Learning: heads on kept features (`probe`), and the whole model (`finetuning`)."""
