"""Backup, restore and drill of one site: PostgreSQL by pgBackRest, the bucket by rclone."""
