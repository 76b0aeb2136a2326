"""One stage, one file, one function `run(...)`: reads files, calls the rooms, writes files, returns what to print."""
