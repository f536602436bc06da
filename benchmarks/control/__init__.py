"""Control of the learning rate, beside what an engineer would do otherwise, at base rates off by ×0.1 to ×30."""
