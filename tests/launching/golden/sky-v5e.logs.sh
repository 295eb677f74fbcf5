#!/bin/bash

# show the logs of first
sky jobs logs --name first --no-follow
