#!/bin/bash

# look for first
sky jobs queue --refresh --all --output json

# cancel first
sky jobs cancel --name first --yes

# on stderr: visor (dry run): first: stopped; SkyPilot takes its machines down
# on stderr: visor (dry run): first: deleted; the workdir stays
