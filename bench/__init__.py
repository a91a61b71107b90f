"""What segue promises about speed and size, measured beside plain uvicorn: ``python -m bench``."""
