"""Trainings, healthy and in danger, whose free signals are recorded, so that rules can be compared on them."""
