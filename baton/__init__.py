"""The command line, and clusters on one machine. Where to look:

baton serve   serve, of local_cluster's processes: supervisor keeps each child (child_pipe: its
              words), embedded_redis, progress
baton admin   admin (admin_options), over admin_client; admin_drain waits; admin_tables
baton doctor  doctor; doctor_checks, with doctor_probe; doctor_pairs, by pair_plan, pair_probe and
              raw_copy; doctor_cluster, by the admin API
pocket_model/ the bundled model, and how it was trained
"""
