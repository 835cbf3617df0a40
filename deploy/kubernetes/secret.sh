#!/bin/sh
# Prints the Secret `leptonic` with new random values: deploy/kubernetes/secret.sh | kubectl apply -f -
set -eu
random() { printf s; od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; } # begins with a letter: never a number
password=$(random)
cat <<END
apiVersion: v1
kind: Secret
metadata: {name: leptonic, namespace: leptonic}
stringData:
  LEPTONIC_NATS_TOKEN: $(random)
  LEPTONIC_POSTGRES_DSN: host=postgres user=leptonic dbname=leptonic password=$password
  LEPTONIC_S3_ACCESS_KEY: $(random)
  LEPTONIC_S3_SECRET_KEY: $(random)
  LEPTONIC_TRAINER_RAY_TOKEN: $(random)
  POSTGRES_PASSWORD: $password
END
