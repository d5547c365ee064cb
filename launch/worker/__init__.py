"""What a worker's Python is started with, as a directory: ``python …/launch/worker FORM TARGET ARGS…``.

A directory rather than a file, because the interpreter removes ``__file__`` from ``__main__`` when a script *file* has
ended, which a module run by ``-m`` keeps: its threads and exit handlers would miss it.
"""
