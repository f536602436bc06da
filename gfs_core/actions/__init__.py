"""From alerts to what is done."""
