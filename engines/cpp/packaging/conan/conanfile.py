"""The recipe: conan create engines/cpp/packaging/conan

Beside it lies a profile that takes what it requires from the system.
"""

from pathlib import Path

from conan import ConanFile
from conan.tools.cmake import CMake, CMakeDeps, CMakeToolchain, cmake_layout
from conan.tools.files import copy


class Fluxdeploy(ConanFile):
    """The library alone; ONNX Runtime is loaded when a bundle is opened."""

    name = "fluxdeploy"
    version = "0.1.0"
    license = "Apache-2.0"
    description = "Pictures from a FLUX.1 bundle, in C and C++"
    package_type = "library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"shared": [True, False], "fPIC": [True, False]}  # noqa: RUF012 - Conan's form
    default_options = {"shared": True, "fPIC": True}  # noqa: RUF012
    requires = "libpng/[>=1.6 <2]", "nlohmann_json/[>=3.10 <4]", "onnxruntime/[>=1.21 <2]"

    def export_sources(self) -> None:
        """The tree that the recipe lies in."""
        source = Path(self.recipe_folder).parents[1]
        for pattern in ("CMakeLists.txt", "cmake/*", "include/*", "src/*"):
            copy(self, pattern, str(source), self.export_sources_folder)
        copy(self, "LICENSE", str(source.parents[1]), self.export_sources_folder)

    def layout(self) -> None:
        """Where things lie."""
        cmake_layout(self)

    def generate(self) -> None:
        """What CMake is told."""
        toolchain = CMakeToolchain(self)
        toolchain.variables["FLUXDEPLOY_COMMAND"] = False
        toolchain.generate()
        CMakeDeps(self).generate()

    def build(self) -> None:
        """Compile."""
        cmake = CMake(self)
        cmake.configure()
        cmake.build()

    def package(self) -> None:
        """Install."""
        copy(self, "LICENSE", self.source_folder, str(Path(self.package_folder) / "licenses"))
        CMake(self).install()

    def package_info(self) -> None:
        """What users link."""
        self.cpp_info.libs = ["fluxdeploy"]
        self.cpp_info.set_property("cmake_target_name", "fluxdeploy::fluxdeploy")
        self.cpp_info.system_libs = ["dl", "pthread"]
