#!/bin/bash

# show the logs of the job and of task 0
tail -n 200 /shared/first/logs/first.log /shared/first/logs/first-0.log
