# Runs on every worker: installs the package into visor/{{ launch.name }}/env, and mounts buckets. A running run keeps
# what it has.
set -eu
case $(systemctl show --property=SubState --value {{ unit }}) in
  running | start | start-pre | stop-sigterm | auto-restart) exit 0 ;;
esac
# The TPU's runtime starts faster with huge pages.
if [ -e /sys/kernel/mm/transparent_hugepage/enabled ]; then
  echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null
fi
cd "visor/{{ launch.name }}"
python3 -m pip install --quiet --user uv
"$HOME/.local/bin/uv" venv --quiet --allow-existing --python 3.12 env
"$HOME/.local/bin/uv" pip install --quiet --python env/bin/python --reinstall-package visor-jax \
  {{ pins | sh_join }} "visor-jax[tpu,gcs] @ file://$PWD/{{ wheel }}"
{% if launch.buckets %}
if ! command -v gcsfuse >/dev/null; then
  release=$(lsb_release -c -s)
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$release main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -q update
  sudo apt-get -q install --yes gcsfuse
fi
{% for bucket in launch.buckets %}
sudo mkdir -p "{{ mounts }}/{{ bucket }}"
mountpoint -q "{{ mounts }}/{{ bucket }}" || sudo gcsfuse -o ro,allow_other --implicit-dirs {{ bucket }} "{{ mounts }}/{{ bucket }}"
{% endfor %}
{% endif %}
