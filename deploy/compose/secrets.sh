#!/bin/sh
# Runs once before everything else, as root: makes what is not there yet, never prints it. Each
# server gets a volume with its own secrets; the services share one.
set -eu
umask 077
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
keep() { # FILE VALUE: written once, whole
  [ -s "$1" ] || { printf '%s' "$2" >"$1.new"; mv "$1.new" "$1"; }
}
services=/secrets/services
keep $services/LEPTONIC_NATS_TOKEN "$(random)"
keep $services/LEPTONIC_S3_ACCESS_KEY "$(random)"
keep $services/LEPTONIC_S3_SECRET_KEY "$(random)"
keep $services/LEPTONIC_TRAINER_RAY_TOKEN "$(random)"
keep /secrets/postgres/password "$(random)"
keep $services/LEPTONIC_POSTGRES_DSN \
  "host=postgres user=leptonic dbname=leptonic password=$(cat /secrets/postgres/password)"
keep /secrets/nats/token.conf "authorization { token: \"$(cat $services/LEPTONIC_NATS_TOKEN)\" }"
keep /secrets/s3/user "$(cat $services/LEPTONIC_S3_ACCESS_KEY)"
keep /secrets/s3/password "$(cat $services/LEPTONIC_S3_SECRET_KEY)"
keep /secrets/edge/leaf "$(random)"
keep /secrets/edge/site "$(random)"
keep /secrets/nats/leaf.conf \
  "authorization { user: edge, password: \"$(cat /secrets/edge/leaf)\" }"
site=$(cat /secrets/edge/site)
keep /secrets/nats-edge/site.conf "SITE_PASSWORD: \"$site\"
UPLINK_PASSWORD: \"$site\"
HUB: \"nats-leaf://edge:$(cat /secrets/edge/leaf)@nats:7422\""
keep /secrets/edge/LEPTONIC_NATS_URL "nats://site:$site@nats-edge:4222"
keep /secrets/edge/LEPTONIC_EDGE_HUB_URL "nats://uplink:$site@nats-edge:4222"
chown -R 10001 $services /secrets/edge
