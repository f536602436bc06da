"""What each tier tells of the exact stability ratio, what it costs, and whether the budget holds."""
