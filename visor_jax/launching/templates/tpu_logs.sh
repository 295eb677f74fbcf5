# Runs on one worker: the end of its log.
{% if launch.in_bucket or not launch.workdir %}
log=$PWD/visor/{{ launch.name }}/run.log
{% else %}
log={{ launch.workdir }}/logs/$(hostname).log
{% endif %}
exec tail -n 200{% if launch.follow %} -F{% endif %} "$log"
