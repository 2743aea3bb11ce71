// Which version a program has been linked with.
#include <fluxdeploy/fluxdeploy.h>

#include <cstdio>

int main() {
    std::puts(fluxdeploy_version());
    return fluxdeploy_api_version() == FLUXDEPLOY_API_VERSION ? 0 : 1;
}
