"""What helps at an alarm: remedies tried out in danger."""
