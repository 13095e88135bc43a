try:
    from tunesmith.cli import main

    code = main()
except KeyboardInterrupt:  # before main has begun, or behind its end
    code = 3
raise SystemExit(code)
