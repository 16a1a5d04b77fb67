"""The measurements behind what the documentation says of speed, memory, numbers and usefulness.

`README.md` beside this file is the guide. Commands are run from the root of the repository, as in
`python -m benchmarks.speed.speed`.
"""
