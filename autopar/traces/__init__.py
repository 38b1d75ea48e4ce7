"""Steps of a program as other tools read them: Chakra execution traces, and timelines of scheduled and real steps."""
