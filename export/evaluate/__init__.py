"""Does a written bundle behave as it must?"""
