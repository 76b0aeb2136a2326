"""The parts of a report, one file each: plain numbers in, a section or what is missing out."""
