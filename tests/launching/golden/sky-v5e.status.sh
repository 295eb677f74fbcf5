#!/bin/bash

# look for first
sky jobs queue --refresh --all --output json
