from miles_spmd.cli import main

if __name__ == "__main__":
    main()
