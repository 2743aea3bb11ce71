"""Many pictures: requests from a file, an index of what is made, and a run that can be resumed."""
