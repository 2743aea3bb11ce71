// A picture: picture BUNDLE PROMPT FILE.png
#include <fluxdeploy/fluxdeploy.h>

#include <cstdio>

int main(int count, char** words) {
    if (count != 4) return 2;
    try {
        fluxdeploy::Pipeline pipeline(words[1]);
        fluxdeploy::write_png(words[3], pipeline.generate(words[2], 7));
    } catch (const fluxdeploy::Error& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
