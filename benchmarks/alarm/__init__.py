"""The early warning beside other rules, on recorded trainings with faults."""
