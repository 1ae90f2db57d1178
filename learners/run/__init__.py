"""How learners are run: config, experiment, plan, ledger, prediction."""
