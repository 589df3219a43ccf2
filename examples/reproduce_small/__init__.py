"""The small reproduction: songs that this project makes, real Whisper base, many short trainings, one table."""
