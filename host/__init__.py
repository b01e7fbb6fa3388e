"""This machine: its memory, processors and devices, its files and log, and torch's private parts.

The other packages use these modules; none of them knows about models.

memory.py: free bytes (of the machine, its cgroups and a GPU) and page-aligned buffers in huge
    pages, which hold weights and which O_DIRECT can read into. Start there.
files.py: text and JSON files, read with errors that name the file and line, written atomically.
log.py: log lines on stderr, which --quiet switches off.
measurements.py: figures that are measured once and saved in the user's cache directory;
bandwidth.py: one of these figures, the rate of reading memory, which limits tokens per second.
threads.py, devices.py: --threads and --device.
torch_private.py: all uses of private parts of PyTorch, with the versions of torch that they work
    on. tests/test_torch_private.py has a test for each, which fails if a new version changes it.
"""
