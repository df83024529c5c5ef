"""A question to many trainings: variants of a run, several seeds of each, and what their encoders are worth."""
