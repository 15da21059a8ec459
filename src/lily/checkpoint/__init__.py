"""What is in an adapter's file, and is it safe to load?"""
