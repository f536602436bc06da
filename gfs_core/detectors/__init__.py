"""From streams of readings to alerts."""
