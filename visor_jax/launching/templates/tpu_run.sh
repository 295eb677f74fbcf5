#!/bin/bash
# One process of the run {{ launch.name }}; systemd runs it on every worker.
set -eu
cd "$(dirname -- "$0")"
{% for name, value in environment %}
export {{ name }}={{ value | sh }}
{% endfor %}
{% for secret in launch.secrets %}
{{ secret }}=$(gcloud secrets versions access latest --secret={{ secret }}{% if launch.project %} --project={{ launch.project }}{% endif %})
export {{ secret }}
{% endfor %}
exec {{ command | sh_join }}
