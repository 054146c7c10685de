"""The dataset doctor: finds what is wrong, or looks wrong, with recorded episodes; `python -m data_utils.doctor`.

diagnosis.py: what a finding is here. checks.py: what summaries of episodes tell, also when training starts.
images.py: what the frames tell. stats.py: whether statistics fit. examination.py: all of it, in parallel.
repair.py: what can be put right. report.py, drawings.py, page.py: the report in HTML.
"""
