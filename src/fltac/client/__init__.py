"""What a data owner does in a round: train one adapter per slot and upload them all."""
