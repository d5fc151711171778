"""What evaluations say of models that may give an image several labels."""
