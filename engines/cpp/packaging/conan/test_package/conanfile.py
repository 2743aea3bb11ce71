"""A program that is linked with the package, as `conan create` runs it."""

from pathlib import Path

from conan import ConanFile
from conan.tools.build import can_run
from conan.tools.cmake import CMake, cmake_layout


class Linked(ConanFile):
    """Says which version it was linked with."""

    settings = "os", "arch", "compiler", "build_type"
    generators = "CMakeDeps", "CMakeToolchain"

    def requirements(self) -> None:
        """The package that was made."""
        self.requires(self.tested_reference_str)

    def layout(self) -> None:
        """Where things lie."""
        cmake_layout(self)

    def build(self) -> None:
        """Compile."""
        cmake = CMake(self)
        cmake.configure()
        cmake.build()

    def test(self) -> None:
        """Run it."""
        if can_run(self):
            self.run(str(Path(self.cpp.build.bindir).resolve() / "linked"), env="conanrun")
