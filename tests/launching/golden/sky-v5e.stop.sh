#!/bin/bash

# look for first
sky jobs queue --refresh --all --output json

# cancel first
sky jobs cancel --name first --yes
