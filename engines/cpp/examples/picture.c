/* A picture from C: picture_c BUNDLE PROMPT FILE.png */
#include <fluxdeploy/fluxdeploy.h>
#include <stdio.h>
#include <string.h>

static int fail(fluxdeploy_error* error) {
    fprintf(stderr, "%s\n", fluxdeploy_error_message(error));
    fluxdeploy_error_free(error);
    return 1;
}

static int on_step(void* user, const fluxdeploy_step* step) {
    (void)user;
    fprintf(stderr, "step %d of %d\n", (int)step->step, (int)step->total);
    return 0; /* anything else cancels */
}

int main(int count, char** words) {
    fluxdeploy_error* error = NULL;
    fluxdeploy_pipeline* pipeline = NULL;
    fluxdeploy_request* request = NULL;
    fluxdeploy_result* result = NULL;
    int status = 1;

    if (count != 4) return 2;
    if (fluxdeploy_pipeline_open(words[1], NULL, &pipeline, &error)) return fail(error);
    request = fluxdeploy_request_new();
    if (request && !fluxdeploy_request_add_prompt(request, words[2], strlen(words[2]))) {
        fluxdeploy_request_set_seed(request, 7);
        fluxdeploy_request_set_callback(request, on_step, NULL);
        if (fluxdeploy_pipeline_generate(pipeline, request, &result, &error) ||
            fluxdeploy_write_png(words[3], fluxdeploy_result_pixels(result, 0),
                                 fluxdeploy_result_width(result), fluxdeploy_result_height(result),
                                 NULL, NULL, 0, &error)) {
            fail(error);
        } else {
            status = 0;
        }
    }
    fluxdeploy_result_free(result);
    fluxdeploy_request_free(request);
    fluxdeploy_pipeline_free(pipeline);
    return status;
}
