class Validation:
    @classmethod
    def of(cls, pipe, samples, config, output_dir):
        return None
