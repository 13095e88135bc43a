try:
    from tunesmith.cli import main

    code = main()
except KeyboardInterrupt:  # before main starts, or after it ends
    code = 3
raise SystemExit(code)
