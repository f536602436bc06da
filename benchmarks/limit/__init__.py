"""Control of the learning rate: whether it makes up for a wrong base rate, its cost, and what it is that works."""
