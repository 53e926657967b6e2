#!/bin/sh
# In the place of Python: tells its arguments and its environment.
printf '%s\0' $# "$@"
exec env PWD="$PWD" env -0
