"""Logs the files of one model and registers them, with MLflow's own client.

Usage: log_models.py FOLDER. Prints the artifact URI of the run. Registers the models `fraud` and
`fraud détection 100%`: version 1 refers to the files, version 2 to the run, version 3 to version 1. The alias `prod` is
version 1, `next` is version 2.
"""

import sys

import mlflow

client = mlflow.MlflowClient()
run = client.create_run(client.create_experiment("tests"))
client.log_artifacts(run.info.run_id, sys.argv[1], "my model")
files = f"{run.info.artifact_uri}/my model"
for name in ["fraud", "fraud détection 100%"]:
    client.create_registered_model(name)
    for source in [files, f"runs:/{run.info.run_id}/my model", f"models:/{name}/1"]:
        client.create_model_version(name, source, run.info.run_id, await_creation_for=0)
    client.set_registered_model_alias(name, "prod", "1")
    client.set_registered_model_alias(name, "next", "2")
print(files)
