"""Images and their labels: one walker, one decoder, one order of classes, one protocol for training and commands."""
